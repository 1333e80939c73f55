"""How made-up scenes are painted."""

import numpy as np
import pytest
from PIL import Image
from uhr_bat.scenes import layout, painting


SIZE = (600, 480)


def test_the_same_seed_gives_the_same_pixels():
    first = np.asarray(painting.example(SIZE, seed=0))
    assert (first == np.asarray(painting.example(SIZE, seed=0))).all()
    assert (first != np.asarray(painting.example(SIZE, seed=1))).any()


LARGE = [pytest.param(size, marks=pytest.mark.slow) for size in ((200, 50), (600, 60))]


@pytest.mark.parametrize("size", [(1, 1), (50, 200), (200, 2), (6, 60), *LARGE])
def test_any_size_can_be_painted(size):
    image = painting.example(size)
    assert image.size == size and image.mode == "RGB"


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_scene_looks_alike_at_two_sizes(seed):
    small, large = (
        np.asarray(painting.example(size, seed).resize((75, 60), Image.BOX)).astype(float)
        for size in (SIZE, (1200, 960))
    )
    other = np.asarray(painting.example(SIZE, seed + 10).resize((75, 60), Image.BOX)).astype(float)
    assert np.abs(small - large).mean() < 4
    assert np.abs(small - other).mean() > 12


@pytest.mark.slow
def test_objects_are_painted_where_they_stand_in_their_colour():
    scene = layout.make_scene(0, 1.25)
    pixels = np.asarray(painting.render(scene, (2000, 1600))).astype(int)
    things = [thing for thing in scene.objects if thing.size > 4 * layout.WIDTH / layout.FINEST]
    assert len(things) > 10
    for thing in things:
        column, row = (int(value * 0.2) for value in thing.centre)
        reach = int(thing.size * 0.2 / 2)
        around = pixels[row - reach : row + reach + 1, column - reach : column + reach + 1].reshape(-1, 3)
        # Light, haze and the object's own shade change a colour by less than the distance to another one.
        far = {name: np.abs(around - paint).max(-1) for name, paint in layout.PAINTS.items()}
        assert (far[thing.colour] < 60).mean() > 0.2


def test_a_scene_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "scene.png"
    path.write_bytes(b"the one before")

    def stop(image, file, **kwargs):
        with open(file, "wb") as opened:
            opened.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises(OSError, match="disk full"):
        painting.write(path, (50, 40))
    assert [file.name for file in tmp_path.iterdir()] == ["scene.png"]
    assert path.read_bytes() == b"the one before"


def test_the_command_writes_the_scene_of_a_seed(tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "scene.png"
    monkeypatch.setattr("sys.argv", ["scenes", "--output", str(path), "--size", "50", "40", "--seed", "3"])
    painting.main()
    assert "50 x 40 px" in capsys.readouterr().out
    with Image.open(path) as image:
        assert (np.asarray(image) == np.asarray(painting.example((50, 40), 3))).all()
