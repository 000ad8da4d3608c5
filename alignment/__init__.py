"""Preference losses on the chunked engine. Empty as yet: they come in a later version."""

__all__: list[str] = []
