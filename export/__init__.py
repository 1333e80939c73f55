"""Tools that build model folders. They run in a bare clone too, where the package is not installed:
`python -m export.convert_checkpoint`, or `python export/convert_checkpoint.py`.

Imports between these files are relative, all others are `from uhr_bat... import`: whichever way they are run, there is
one of every class.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if __name__ == "export" and "uhr_bat" not in sys.modules:  # a bare clone: the folder above is the package
    _root = Path(__file__).resolve().parent.parent
    _spec = spec_from_file_location("uhr_bat", _root / "__init__.py", submodule_search_locations=[str(_root)])
    sys.modules["uhr_bat"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["uhr_bat"])
