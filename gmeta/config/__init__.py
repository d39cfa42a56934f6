"""The configuration of every command: frozen dataclasses that check themselves.

Values come from YAML (`--config`) and dotted overrides (`--meta.inner_lr 0.05`). A value out of range is a ValueError
of one form: `section.key is VALUE: what it must be`.
"""
