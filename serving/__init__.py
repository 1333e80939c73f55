"""A server for many users: images encoded once, questions compressed as they come, the decoder's steps shared by all."""
