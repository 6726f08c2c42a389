"""The layout in which DeepSeek publishes Janus and Janus-Pro: read, and written.

It has names of its own for tensors, settings and special tokens. `names` maps the tensors,
`config` the settings, `processor` the tokenizer's files; `files` reads and writes a folder.
"""
