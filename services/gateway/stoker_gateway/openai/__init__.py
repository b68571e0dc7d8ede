"""OpenAI's HTTP shapes: bodies to requests, answers and errors to bodies. Pure."""
