"""What images a request may name."""

import asyncio
import base64
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from asking import data_uri, picture
from uhr_bat.serving import sources
from uhr_bat.serving.refusals import Refusal
from uhr_bat.serving.sources import SourceRules, is_public

TIFF = b"II*\0" + bytes(20)


def read(rules, url):
    return asyncio.run(rules.read(url))


def refusal(rules, url):
    with pytest.raises(Refusal) as refused:
        read(rules, url)
    assert 400 <= refused.value.status < 500
    return refused.value.message


# Base64


def test_a_data_url_is_its_bytes():
    url = data_uri(picture())
    source = read(SourceRules(10**6), url)
    assert source.content == base64.b64decode(url.partition(",")[2])
    assert source.digest == read(SourceRules(10**6), url.replace("image/png", "image/x")).digest


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,cGljdHVyZTE+/w==",
        "data:image/png;base64,cGljdHVyZTE+/w",
        "data:image/png;base64,cGlj\r\ndHVy ZTE+\n/w==\n",
        "data:image/png;base64,cGljdHVyZTE%2B%2Fw%3D%3D",
        "DATA:image/png;name=a.png; BASE64,cGljdHVyZTE+/x==#here",
        " data:;base64,%63GljdHVyZTE+/w==\t",
        "data:image/png,picture1%3e%FF",
    ],
)
def test_a_data_url_is_read_as_the_url_standard_says(url, monkeypatch):
    for step in (2**20, 5, 4):
        monkeypatch.setattr(sources, "DECODED_LETTERS", step)
        assert read(SourceRules(1000), url).content == b"picture1>\xff"


@pytest.mark.parametrize(
    "url, message",
    [
        ("data:image/png;base64,!!!!", "it is not base64"),
        ("data:image/png;base64,AAA\u00e9", "it is not base64"),
        ("data:image/png;base64", "data:image/...;base64"),
        ("data:image/png;base64,AAAAA", "one is missing, or one is too many"),
        ("data:image/png;base64,AA-_", "- and _ are of the alphabet for names and URLs"),
        ("data:image/png;base64,AA=A", "it is not base64"),
        ("data:image/png;base64,AA%FFA", "it is not base64"),
        ("https://[::1/a.png", "no https: URL"),
        ("data:image/png," + "%41" * 1500, "1500 bytes are over the limit of 1000 bytes"),
        ("data:image/png;base64," + "A" * 2000, "1500 bytes are over the limit of 1000 bytes"),
        ("AAAA", "must be a data: URL"),
        ("ftp://example.org/a.png", "must be a data: URL"),
        ("/vsicurl/http://example.org/a.tif", "opens no paths"),
        ("GTIFF_DIR:1:/etc/passwd", "must be a data: URL"),
        ("", "must be a data: URL"),
    ],
)
def test_what_is_no_image_url_is_refused(url, message):
    assert message in refusal(SourceRules(1000), url)


# Addresses


@pytest.mark.parametrize(
    "address",
    """127.0.0.1 127.8.9.10 0.0.0.0 10.0.0.8 172.16.3.4 192.168.1.1 169.254.169.254 100.64.0.1 224.0.0.1 255.255.255.255
    ::1 :: fe80::1%eth0 fc00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 2002:7f00:1::
    2001:db8::1 64:ff9b:1::7f00:1 ::127.0.0.1 ::1.1.1.1 ::ffff:0:127.0.0.1 fec0::1 3fff::1 5f00::1 100::1 2001:10::1
    192.0.0.8 192.88.99.1 198.18.0.1 240.0.0.1""".split(),
)
def test_addresses_of_this_machine_and_its_networks_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "2002:101:101::1", "93.184.215.14", "2606:4700::1111", "::ffff:1.1.1.1"])
def test_addresses_of_the_open_internet_are_public(address):
    assert is_public(address)


@pytest.fixture
def names(monkeypatch):
    """{name: addresses} that the system's resolver knows in a test."""
    known = {}

    def look_up(host, port):
        if host not in known:
            raise OSError("unknown")
        return known[host]

    monkeypatch.setattr(sources, "look_up", look_up)
    return known


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/a.png", "https://[::1]/a.png", "https://2130706433/a.png", "https://0x7f.1/a.png",
        "https://169.254.169.254/latest/meta-data", "https://[::ffff:169.254.169.254]/", "https://localhost/a.png",
    ],
)  # fmt: skip
def test_hosts_that_are_addresses_of_this_network_are_refused(url):
    message = refusal(SourceRules(1000), url)
    assert "not public" in message or "not known" in message


def test_a_name_with_any_address_that_is_not_public_is_refused(names):
    names["rebinding.example"] = ["1.1.1.1", "10.0.0.1"]
    assert "has an address that is not public" in refusal(SourceRules(1000), "https://rebinding.example/a.png")


@pytest.mark.parametrize(
    "url, message",
    [
        ("http://example.org/a.png", "only https: is fetched"),
        ("https://user:secret@example.org/a.png", "name a host, and no user"),
        ("https:///a.png", "name a host"),
        ("https://example.org:70000/a.png", "no https: URL"),
        ("https://nowhere.example/a.png?token=secret", "its host is not known"),
    ],
)
def test_other_urls_are_refused_and_their_secrets_are_not_repeated(names, url, message):
    said = refusal(SourceRules(1000), url)
    assert message in said and "token=" not in said


class Site(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"]))
        status, headers, content = self.server.pages[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(names):
    """A server of this machine, whose name `inside.example` may be private; `pages`: {path: (status, headers, body)}."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.pages, server.asked = {}, []
    server.url = f"http://inside.example:{server.server_address[1]}"
    names["inside.example"] = ["127.0.0.1"]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def allowed(max_bytes=1000):
    return SourceRules(max_bytes, private_hosts=frozenset({"inside.example"}))


def test_a_host_that_the_server_allows_is_asked_by_its_name_at_the_address_that_was_checked(site):
    site.pages["/a.png?x=1"] = (200, {}, b"picture")
    assert read(allowed(), site.url + "/a.png?x=1").content == b"picture"
    assert site.asked == [("/a.png?x=1", site.url.removeprefix("http://"))]


def test_a_redirect_is_followed_only_to_what_may_be_asked(site, names):
    site.pages["/a"] = (302, {"Location": "/b"}, b"")
    site.pages["/b"] = (200, {}, b"picture")
    assert read(allowed(), site.url + "/a").content == b"picture"
    names["metadata.example"] = ["169.254.169.254"]
    site.pages["/a"] = (302, {"Location": "https://metadata.example/keys"}, b"")
    assert "not public" in refusal(allowed(), site.url + "/a")
    site.pages["/a"] = (302, {"Location": "file:///etc/passwd"}, b"")
    assert "no https: URL" in refusal(allowed(), site.url + "/a")
    site.pages["/a"] = (302, {"Location": "/a"}, b"")
    assert "redirected more than 3 times" in refusal(allowed(), site.url + "/a")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_every_redirect_is_followed(site, status):
    site.pages["/a"], site.pages["/b"] = (status, {"Location": "b"}, b""), (200, {}, b"picture")
    assert read(allowed(), site.url + "/a").content == b"picture"


@pytest.mark.parametrize("status", [204, 300, 302, 304, 307, 399])
def test_a_redirect_to_nowhere_is_an_error(site, status):
    site.pages["/a"] = (status, {}, b"")
    assert f"its server answers {status}" in refusal(allowed(), site.url + "/a")


@pytest.mark.parametrize("location", ["", "https://", "http://[", "//", "\xff", "https://a b/"])
def test_a_redirect_to_what_is_no_url_is_an_error(site, location):
    site.pages["/a"] = (302, {"Location": location}, b"")
    assert "is not read: " in refusal(allowed(), site.url + "/a")


def test_all_addresses_of_a_host_are_tried(site, names):
    site.pages["/a"] = (200, {}, b"picture")
    names["inside.example"] = ["::1", "127.0.0.2", "127.0.0.1"]  # where nobody listens, first
    assert read(allowed(), site.url + "/a").content == b"picture"
    names["inside.example"] = ["::1", "127.0.0.2"]
    assert "cannot be fetched (ConnectError)" in refusal(allowed(), site.url + "/a")


def test_an_image_that_is_too_large_is_not_read_to_its_end(site):
    site.pages["/stated"] = (200, {"Content-Length": "5000"}, b"")
    site.pages["/not-stated"] = (200, {}, bytes(5000))
    for path in ("/stated", "/not-stated"):
        assert "over the limit of 1000 bytes" in refusal(allowed(), site.url + path)


def test_a_server_that_says_no_or_nothing_is_an_error(site, monkeypatch):
    site.pages["/gone"] = (404, {}, b"")
    assert "its server answers 404" in refusal(allowed(), site.url + "/gone")
    monkeypatch.setattr(sources, "FETCH_SECONDS", 0)
    assert "did not arrive within 0 seconds" in refusal(allowed(), site.url + "/gone")


# Paths


@pytest.fixture
def folder(tmp_path):
    """A folder that requests may name, with a file in it, and one beside it that they may not."""
    inside = tmp_path / "open"
    inside.mkdir()
    (inside / "a b.png").write_bytes(b"picture")
    (inside / "a.tif").write_bytes(TIFF)
    (inside / "a.vrt").write_text("<VRTDataset><SourceFilename>/etc/passwd</SourceFilename></VRTDataset>")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "up").symlink_to(tmp_path)
    (inside / "loop").symlink_to(inside / "loop")
    os.mkfifo(inside / "pipe")
    return inside


def test_files_below_the_folder_are_read(folder):
    rules = SourceRules(1000, folder)
    assert read(rules, str(folder / "a b.png")).content == b"picture"
    assert read(rules, (folder / "a b.png").as_uri()).content == b"picture"
    assert read(rules, f"file://localhost{folder}/../open/a%20b.png").content == b"picture"


def test_a_raster_is_read_where_it_lies_and_known_by_its_content(folder):
    rules = SourceRules(10, folder)
    before = read(rules, str(folder / "a.tif"))
    assert before.content == str(folder / "a.tif")
    (folder / "a.tif").write_bytes(TIFF + b"more")
    assert read(rules, str(folder / "a.tif")).digest != before.digest


def test_what_names_other_files_is_never_opened_as_such(folder):
    # Bytes without a path: nothing can follow what they name.
    assert isinstance(read(SourceRules(1000, folder), str(folder / "a.vrt")).content, bytes)


@pytest.mark.parametrize(
    "name", ["../secret.png", "link.png", "up/secret.png", "loop", "missing.png", "", "pipe", "a\0.png", "x" * 5000]
)
def test_no_path_leads_out_of_the_folder(folder, name):
    assert "no such file in the folder" in refusal(SourceRules(1000, folder), f"{folder}/{name}")


def test_other_machines_and_other_folders_are_refused(folder):
    assert "no other machine" in refusal(SourceRules(1000, folder), "file://elsewhere/etc/passwd")
    assert "no such file in the folder" in refusal(SourceRules(1000, folder), "file:///etc/passwd")
    assert "no such file in the folder" in refusal(SourceRules(1000, folder), "file:///%2e%2e/etc/passwd")
    assert "opens no paths" in refusal(SourceRules(1000), str(folder / "a b.png"))


def test_a_picture_of_the_folder_has_a_limit_too(folder):
    assert "7 bytes are over the limit of 5 bytes" in refusal(SourceRules(5, folder), str(folder / "a b.png"))
