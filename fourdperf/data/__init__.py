"""Videos, pictures and the demo clip: what goes into a model and what people look at afterwards."""
