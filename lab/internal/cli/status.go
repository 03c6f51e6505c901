package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/lab/internal/cluster"
	"github.com/doppel-dev/doppel/lab/internal/pki"
	"github.com/doppel-dev/doppel/lab/internal/state"
)

// status is what `lab status -o json` prints.
type status struct {
	Name      string   `json:"name"`
	State     string   `json:"state"` // up, damaged, starting or down
	APIServer string   `json:"apiServer,omitempty"`
	Nodes     []string `json:"nodes,omitempty"`
	Laptops   []string `json:"laptops,omitempty"`
	Dead      []string `json:"dead,omitempty"`
}

func (a *app) statusCommand() *cobra.Command {
	format := ""
	cmd := &cobra.Command{
		Use: "status", Short: "Tell how the lab is; the exit code is 0 only if it is up", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			s, err := readStatus(a.name)
			if err != nil {
				return err
			}
			if err := s.print(format); err != nil {
				return err
			}
			if s.State != "up" {
				return exitError(1)
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&format, "output", "o", "text", "text or json")
	return cmd
}

func readStatus(name string) (status, error) {
	lab, err := state.Load(name)
	if errors.Is(err, fs.ErrNotExist) {
		return status{Name: name, State: "down"}, nil
	}
	if err != nil {
		return status{}, err
	}
	s := status{Name: name, State: "up", APIServer: lab.Plan.APIServerURL(), Laptops: slices.Sorted(maps.Keys(lab.Laptops))}
	for _, n := range lab.Plan.AllNodes() {
		s.Nodes = append(s.Nodes, n.Name)
	}
	s.Dead = cluster.Dead(lab)
	switch {
	case !lab.Ready:
		s.State = "starting"
	case len(s.Dead) > 0:
		s.State = "damaged"
	}
	return s, nil
}

func (s status) print(format string) error {
	switch format {
	case "json":
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(s)
	case "text":
		fmt.Printf("Lab %s: %s\n", s.Name, s.State)
		for _, line := range [][2]string{
			{"API server", s.APIServer},
			{"Nodes", strings.Join(s.Nodes, ", ")},
			{"Laptops", strings.Join(s.Laptops, ", ")},
			{"Not running", strings.Join(s.Dead, ", ")},
		} {
			if line[1] != "" {
				fmt.Printf("  %-11s : %s\n", line[0], line[1])
			}
		}
		return nil
	}
	return fmt.Errorf("the format %q is neither text nor json", format)
}

func (a *app) kubeconfigCommand() *cobra.Command {
	as, user := "admin", ""
	var groups []string
	cmd := &cobra.Command{
		Use: "kubeconfig", Short: "Print a kubeconfig", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			conf, err := a.kubeconfig(as, user, groups)
			if err != nil {
				return err
			}
			_, err = os.Stdout.Write(conf)
			return err
		},
	}
	cmd.Flags().StringVar(&as, "as", as, "admin, or developer who has no rights until they are given")
	cmd.Flags().StringVar(&user, "as-user", "", "any user name, with a new certificate")
	cmd.Flags().StringArrayVar(&groups, "as-group", nil, "group of the user of --as-user; may be given several times")
	return cmd
}

func (a *app) kubeconfig(as, user string, groups []string) ([]byte, error) {
	lab, err := cluster.Open(a.name)
	if err != nil {
		return nil, err
	}
	dir, err := pki.Open(lab.Path("pki"))
	if err != nil {
		return nil, err
	}
	if user != "" {
		return dir.KubeconfigFor(cluster.Target(lab), pki.Identity{User: user, Groups: groups})
	}
	if as != "admin" && as != "developer" {
		return nil, fmt.Errorf("the role %q is neither admin nor developer", as)
	}
	return dir.Kubeconfig(cluster.Target(lab), as)
}
