"""What `scd` prints without a command: all of them in a line each."""

USAGE = """usage: scd COMMAND ...

  demo [WORLD]              stream and steer a world that comes with the package (seconds);
                            --train: train a small one and its dense twin, compare (minutes)
  worlds                    the worlds that come with the package, with sizes and pictures
  play [RUN]                a world in the browser, steered by keyboard, mouse or touch
  record toy|doom|gym       record clips with actions; gym: any environment of Gymnasium
  data check PATH           what there is of a collection of clips, and what is missing
  data export lerobot       write clips as a LeRobot dataset
  encode DATA               write the latents of clips once, for training
  train-autoencoder         train the network between pixels and latents
  train PRESET              train a model on clips
  distill TEACHER           make a student of a few steps per frame from a trained model
  serve [RUN]               a server of many streams: page, WebSocket, HTTP; without RUN of the
                            world that comes with the package
  sample RUN                stream frames from a trained model, or video of a prompt (--prompt)
  vbench RUN                videos of many prompts, in VBench's folder layout
  train-judge               train the inverse dynamics model that measures control (minutes)
  evaluate RUN              measure a trained model on held-out clips
  protocols                 named protocols for evaluate --protocol, with every setting
  weights i3d|list          fetch the network of FVD by pip, once; list what metrics need
  probe RUN                 what each layer of a trained model does, and where to split it
  bench                     seconds, memory and share of the machine's limit per frame
  bench compare             two configurations in turns, as a ratio with its spread
  intervene skip|diagonal|recompose RUN
                            change a trained dense model, finetune it and compare
  convert reference FILE    turn a state dict of the paper's release, or of FAR, into ours
  convert autoencoder FILE  turn weights of FAR's autoencoders into a folder for scd encode
  convert wan               make a causal world of Wan2.1: separable, or dense
  export diffusers RUN      turn a Wan world back into what diffusers loads
  export onnx RUN           graphs of a world for ONNX Runtime
  export web RUN            a site that plays a world in its visitors' browsers, without a server

`scd help COMMAND` and `scd COMMAND --help` explain every flag. `scd --version` prints the version;
`scd --print-completion bash|zsh|fish` prints a script that completes commands and flags."""
