"""`python -m modeling_snn_bert` is the command `snn-bert`."""

from .cli import main

if __name__ == "__main__":
    main()
