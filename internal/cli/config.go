package cli

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/doppel-dev/doppel/internal/config"
	"github.com/doppel-dev/doppel/internal/helm"
)

// loadConfig reads the user's configuration once. A file that cannot be used is an error of the commands that use it, and of no other.
func (a *app) loadConfig() {
	if a.configFile, a.configErr = config.File(); a.configErr == nil {
		a.config, a.configErr = config.Load(a.configFile)
	}
}

func (a *app) configCmd() *cobra.Command {
	c := &cobra.Command{Use: "config", Short: "Look at the configuration file"}
	var keys bool
	view := &cobra.Command{
		Use:   "view",
		Short: "Show the configuration that is in force: the file over the defaults",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if keys {
				return a.print(config.Keys(), func(w io.Writer) { fmt.Fprintln(w, strings.Join(config.Keys(), "\n")) })
			}
			return a.configView()
		},
	}
	view.Flags().BoolVar(&keys, "keys", false, "list the keys that the file may have")
	c.AddCommand(view)
	return c
}

// configOutput is the JSON form of config view.
type configOutput struct {
	File   string        `json:"file"`
	Config config.Config `json:"config"`
}

func (a *app) configView() error {
	if a.configErr != nil {
		return a.configErr
	}
	out := configOutput{File: a.configFile, Config: inForce(a.config)}
	b, err := yaml.Marshal(out.Config)
	if err != nil {
		return err
	}
	return a.print(out, func(w io.Writer) { fmt.Fprintf(w, "# %s\n%s", out.File, b) })
}

// inForce is the configuration with the defaults in the places of what is not set.
func inForce(c config.Config) config.Config {
	def := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	def(&c.Output, "text")
	def(&c.LogLevel, "info")
	def(&c.Connect.ManagerNamespace, helm.DefaultNamespace)
	def(&c.Intercept.Address, defaultAddress)
	if c.Intercept.Timeout == 0 {
		c.Intercept.Timeout = config.Duration(defaultInterceptTimeout)
	}
	return c
}

// Defaults of doppel intercept.
const (
	defaultAddress          = "127.0.0.1"
	defaultInterceptTimeout = time.Minute
)
