"""Writes the API reference, a page for each module, from the docstrings.

python docs/build_reference.py outputs/docs
"""

import argparse
import pkgutil
from pathlib import Path

import modeling_snn_bert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path, help="folder for the pages")
    output_dir = parser.parse_args().output_dir
    try:
        import pdoc
    except ImportError as error:
        raise SystemExit("the reference is built by pdoc: `pip install pdoc`") from error
    pdoc.render.configure(docformat="google", search=True, footer_text=f"snn-bert {modeling_snn_bert.__version__}")
    # What starts with an underscore is compiled or starts the command line. A module that has the name of something
    # public comes along with the package.
    modules = sorted(module.name for module in pkgutil.iter_modules(modeling_snn_bert.__path__))
    modules = [name for name in modules if not name.startswith("_") and name not in modeling_snn_bert.__all__]
    names = [f"modeling_snn_bert.{name}" for name in modules]
    pdoc.pdoc("modeling_snn_bert", *names, output_directory=output_dir)


if __name__ == "__main__":
    main()
