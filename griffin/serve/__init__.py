"""The door: OpenAI's HTTP API, a chat page, sessions and Vertex AI's contract over one engine.

It sees requests, tokens and events, never tensors. Everything here needs the extra `serve`, and nothing here imports
torch before the model is loaded, so that the port answers within two seconds of the start.
"""
