"""`python -m hf_pretrain` is `hf-pretrain`."""

from hf_pretrain.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
