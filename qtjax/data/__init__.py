"""Data: sources -> rows -> examples -> token ids with trained spans -> packed rows. numpy out, no jax.

sources, delimited, rows   where rows come from, and where in their file each one stands
examples                   five shapes of rows, one meaning
templates, spans           chat templates rendered by transformers, and which tokens of the rendering are trained
tokenizer, tokenize        loading and checking tokenizers; examples to a TokenizedDataset (dataset)
packing, iterate           samples into fixed-shape rows; which samples a step reads
prepare                    all of it from the config's data section
"""
