"""The HTTP side of a node: from the gateway's request to the instance's answer."""
