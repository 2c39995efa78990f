"""A load test for any server with the OpenAI API: what to send, sending it, and what came back."""
