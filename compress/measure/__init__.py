"""How fast: whole files, folders and single operators, on the machine at hand."""
