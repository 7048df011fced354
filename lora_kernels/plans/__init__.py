"""How a GPU kernel cuts its work: the tables, the file of measured plans, and the choice between them."""
