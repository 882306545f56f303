"""The stages as DVC runs them: a script each, with the order of the calls. They are yours to change."""
