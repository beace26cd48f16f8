"""Whether matplotlib is there; if not, an error that says how to get it."""

try:
    import matplotlib as matplotlib
except ImportError as error:
    raise ImportError(
        "gendiff.plot draws with matplotlib, which is not installed: pip install 'gendiff[plot]'."
    ) from error
