"""Search methods: the protocol that each of them follows, and when a search stops early."""
