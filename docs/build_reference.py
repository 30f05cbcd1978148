"""Writes the API reference, a page for each module, from the docstrings.

python docs/build_reference.py outputs/docs
"""

import pkgutil
import sys
from pathlib import Path

import modeling_snn_bert


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python docs/build_reference.py FOLDER")
    try:
        import pdoc
    except ImportError as error:
        raise SystemExit("the reference is built by pdoc: `pip install pdoc`") from error
    modules = sorted(module.name for module in pkgutil.iter_modules(modeling_snn_bert.__path__))
    # What starts with an underscore is compiled or starts the command line.
    names = [f"modeling_snn_bert.{name}" for name in modules if not name.startswith("_")]
    pdoc.render.configure(docformat="google", search=True, footer_text=f"snn-bert {modeling_snn_bert.__version__}")
    pdoc.pdoc("modeling_snn_bert", *names, output_directory=Path(sys.argv[1]))


if __name__ == "__main__":
    main()
