// Command lab runs a real Kubernetes and laptops beside it in the network namespaces of one Linux machine.
package main

import (
	"os"

	"github.com/doppel-dev/doppel/lab/internal/cli"
)

func main() {
	os.Exit(cli.Main(os.Args[1:]))
}
