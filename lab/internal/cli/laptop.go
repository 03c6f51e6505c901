package cli

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/lab/internal/cluster"
	"github.com/doppel-dev/doppel/lab/internal/laptop"
	"github.com/doppel-dev/doppel/lab/internal/state"
	"github.com/doppel-dev/doppel/lab/internal/wan"
)

func (a *app) laptopCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "laptop", Short: "Machines outside the cluster that reach its API server and nothing else of it"}
	cmd.AddCommand(
		a.laptopChange("add NAME", "Make a laptop", laptop.Add),
		a.laptopChange("rm NAME", "Remove a laptop and end what runs on it", laptop.Remove),
		a.laptopExecCommand(), a.laptopLinkCommand(),
	)
	return cmd
}

// locked runs change on the record of the lab, under its lock.
func (a *app) locked(change func(*state.Lab) error) error {
	// Before the lock, which would leave a file for a lab that is not there.
	if _, err := cluster.Open(a.name); err != nil {
		return err
	}
	unlock, err := state.Lock(a.name)
	if err != nil {
		return err
	}
	defer unlock()
	lab, err := cluster.Open(a.name)
	if err != nil {
		return err
	}
	return change(lab)
}

func (a *app) laptopChange(use, short string, change func(*state.Lab, string) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return a.locked(func(lab *state.Lab) error { return change(lab, args[0]) })
		},
	}
}

func (a *app) laptopExecCommand() *cobra.Command {
	o := laptop.ExecOptions{}
	cmd := &cobra.Command{
		Use: "exec NAME -- CMD...", Short: "Run a command on a laptop",
		RunE: func(cmd *cobra.Command, args []string) error {
			before, argv, err := splitAtDash(cmd, args)
			if err != nil {
				return err
			}
			if len(before) != 1 {
				return fmt.Errorf("exactly one laptop before --, not %d", len(before))
			}
			if o.BinDir, err = binDir(); err != nil {
				return err
			}
			lab, err := cluster.Open(a.name)
			if err != nil {
				return err
			}
			return withSignals(func(started func(*os.Process)) error { return laptop.Exec(lab, before[0], o, argv, started) })
		},
	}
	cmd.Flags().StringVar(&o.As, "as", "admin", "role in the cluster: admin or developer")
	cmd.Flags().IntVar(&o.UID, "user", 0, fmt.Sprintf("user id on the laptop; %d is %s, who may use sudo", laptop.UID, laptop.User))
	return cmd
}

func (a *app) laptopLinkCommand() *cobra.Command {
	var delay time.Duration
	loss := ""
	cmd := &cobra.Command{
		Use: "link NAME [up|down]", Args: cobra.RangeArgs(1, 2), ValidArgs: []string{"up", "down"},
		Short: "Pull a laptop's cable or put it back, and make its line long or bad",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.locked(func(lab *state.Lab) error {
				l, err := laptop.Get(lab, args[0])
				if err != nil {
					return err
				}
				if len(args) > 1 {
					if args[1] != "up" && args[1] != "down" {
						return fmt.Errorf("%q is neither up nor down", args[1])
					}
					l.Link.Down = args[1] == "down"
				}
				if cmd.Flags().Changed("delay") {
					l.Link.Delay = delay
				}
				if cmd.Flags().Changed("loss") {
					if l.Link.Loss, err = parseLoss(loss); err != nil {
						return err
					}
				}
				if err := wan.SetLink(cmd.Context(), lab, l); err != nil {
					return err
				}
				lab.Laptops[args[0]] = l
				return lab.Save()
			})
		},
	}
	cmd.Flags().DurationVar(&delay, "delay", 0, "delay in each direction, for example 30ms; 0 for none")
	cmd.Flags().StringVar(&loss, "loss", "", "share of packets lost in each direction, for example 0.1%; 0 for none")
	return cmd
}

// parseLoss reads a percentage, with or without its sign, as a share from 0 to 1.
func parseLoss(s string) (float64, error) {
	percent, err := strconv.ParseFloat(strings.TrimSuffix(s, "%"), 64)
	if err != nil {
		return 0, fmt.Errorf("the loss %q is not a percentage", s)
	}
	return percent / 100, nil
}
