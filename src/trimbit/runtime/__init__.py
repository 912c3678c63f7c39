"""What `import trimbit` loads: runs a compressed directory inside transformers.

Takes a structure from config.json; gives a model with packed layers.
"""
