"""The zoo: small random models of many architectures, on which every promise is tried."""
