"""gRPC servicers, metrics and admin HTTP of the daemons. They translate and delegate; core and host decide."""
