def available():
    return "not here yet"
