"""The verbs: python -m tools.VERB, or dance-seg VERB."""
