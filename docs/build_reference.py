"""Writes the API reference, a page for each module, from the docstrings.

python docs/build_reference.py outputs/docs
"""

import argparse
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
    # Its modules come along; `__main__` only starts the command line.
    pdoc.pdoc("modeling_snn_bert", "!modeling_snn_bert.__main__", output_directory=output_dir)


if __name__ == "__main__":
    main()
