"""Where deciding meets transforming: plans are tried on the model.

Takes plans and a quantiser; gives candidates' weights, applied directories, the model under masks.
"""
