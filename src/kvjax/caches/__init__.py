"""Cache methods, one file each; `base` holds the contract, `plan` says which cache each layer has."""
