"""Search methods: the protocol that every method follows, and rules that stop a search early."""
