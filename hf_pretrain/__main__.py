"""`python -m hf_pretrain` is `hf-pretrain`."""

from hf_pretrain.cli import main

raise SystemExit(main())
