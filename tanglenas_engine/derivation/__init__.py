"""From a trained supernet to one architecture within a budget."""
