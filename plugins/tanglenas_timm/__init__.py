"""What spaces of timm's networks have in common: the folders that timm writes and reads."""
