"""Maps the folders of the repository to packages; everything else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

# The programs and the card templates live beside the library in the repository and inside it once installed, so that
# no package with a generic name lands in site-packages.
MAPPED = {"hf_pretrain.trainers": "trainers", "hf_pretrain.model_cards": "model_cards"}

setup(packages=[*find_namespace_packages(include=["hf_pretrain", "hf_pretrain.*"]), *MAPPED], package_dir=MAPPED)
