"""The folder that ``grace-ds run COMMAND`` puts on PYTHONPATH; Python imports its ``sitecustomize`` when it starts."""
