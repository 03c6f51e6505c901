// Command doppel puts a laptop into a Kubernetes cluster's network and a local process in a service's place.
package main

import (
	"os"

	"github.com/doppel-dev/doppel/internal/cli"
)

func main() {
	os.Exit(cli.Main(os.Args[1:]))
}
