"""gRPC servicers and admin HTTP of the daemons: thin, they translate and hand on."""
