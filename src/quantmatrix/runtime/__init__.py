"""Runtime: from a request to a plan, a pipeline and a run. Reads no table and makes no stand-in."""
