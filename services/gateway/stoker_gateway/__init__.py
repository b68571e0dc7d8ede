"""The gateway: HTTP in OpenAI's shape, tokenising, request queues, token journals, routing among ready instances."""
