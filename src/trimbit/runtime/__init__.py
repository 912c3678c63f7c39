"""Running a compressed directory inside transformers, after `import trimbit`.

Takes the structure in config.json; gives a model with packed layers.
"""
