"""The verbs of `stream-app`, one per file.

A module here says what its verb takes and prints, and calls what does the work. Faust, pandas, aiokafka,
rich and pydantic are imported inside the functions: `--help` answers at once, and nothing is connected by
importing.
"""
