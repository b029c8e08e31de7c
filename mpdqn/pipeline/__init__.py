"""The pipeline: stages of the online and the target network, and the runtime that runs an action table over them."""
