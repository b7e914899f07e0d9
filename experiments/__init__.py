"""The papers' claims, measured again: one folder per question. They import griffin, which never imports them."""
