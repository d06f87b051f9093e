"""From text to examples.

`prepare` (one language) and `multilingual` take the options of `arguments` and return a tokenizer and examples.
Text is found and read in `text/`, becomes tokenized documents in `documents/`, and examples are views of the documents in
`examples/`; `streaming/` does all of it while training reads. `draws` makes every random choice of the way, by keys.
"""
