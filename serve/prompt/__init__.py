"""A request to token ids, and to the grammar of its answer.

In the order in which a request passes them: `conversation` (turns), `adapt` (as the chat template takes them), `plan`
(placeholders for the answers), `render` (the template's text, cut at the answers), `tokenizer` (token ids). `probe`
finds out once what a `template` takes and writes; `tools_first` moves the tools before the system text. `replay` has
the ids of earlier answers, `signing` the signatures of their thinking. `grammar` is the form of an answer, `masks` the
tokens that it allows next.
"""
