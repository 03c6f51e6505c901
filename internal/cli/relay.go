package cli

import (
	"cmp"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/internal/helm"
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/relayclient"
	"github.com/doppel-dev/doppel/internal/uerr"
)

func (a *app) relayCmd() *cobra.Command {
	c := &cobra.Command{Use: "relay", Short: "What a relay knows: clusters, and tokens for programs"}
	c.AddCommand(a.addClusterCmd(), a.tokenCmd(), a.relayAllowCmd(), a.relayDenyCmd())
	return c
}

func (a *app) addClusterCmd() *cobra.Command {
	var relay string
	var req relayapi.AddClusterRequest
	c := &cobra.Command{
		Use:   "add-cluster NAME",
		Short: "Make a cluster known to a relay, and say how its traffic-manager joins (admins of a team)",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			_, login, client, err := a.atRelay(c.Context(), relay)
			if err != nil {
				return err
			}
			req.Name = args[0]
			var out relayapi.AddClusterResult
			if err := client.Call(c.Context(), relayapi.PathAddCluster, req, &out); err != nil {
				return err
			}
			return a.print(out, func(w io.Writer) {
				fmt.Fprintf(w, "%s is known to %s. Its traffic-manager joins with this token, which is shown once:\n", out.Name, login.URL)
				ns := cmp.Or(a.config.Connect.ManagerNamespace, helm.DefaultNamespace)
				fmt.Fprintf(w, "  %s\n", relayapi.SecretCommand(ns, out.Token, login.CA))
				fmt.Fprintf(w, "  doppel helm upgrade%s --set relay.url=%s\n", kube.ManagerFlag(ns), login.URL)
			})
		},
	}
	c.Flags().StringVar(&req.Team, "team", "", "whose it is, if you are an admin of several teams")
	relayFlag(c, &relay)
	return c
}

func (a *app) tokenCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "token",
		Short: "Tokens with which programs (CI) make previews as you",
		Long: `Tokens let programs do at the relay what you may do there, but for making tokens. A program has one in the variable DOPPEL_RELAY_TOKEN,
and the relay's URL in DOPPEL_RELAY or in relay.url of its configuration.`,
	}
	c.AddCommand(a.tokenCreateCmd(), a.tokenListCmd(), a.tokenDeleteCmd())
	return c
}

// tokenCommand is a command about the tokens of a person who is logged in.
func (a *app) tokenCommand(c *cobra.Command, call func(c *cobra.Command, client *relayclient.Client, login relayclient.Login, args []string) error) *cobra.Command {
	var relay string
	c.RunE = func(c *cobra.Command, args []string) error {
		_, login, client, err := a.atRelay(c.Context(), relay)
		if err != nil {
			return err
		}
		if login.FromEnv {
			return uerr.New(uerr.Denied, "unset it, and log in with: doppel login "+login.URL, "the token in %s may not make, list or end tokens", relayclient.EnvToken)
		}
		return call(c, client, login, args)
	}
	relayFlag(c, &relay)
	return c
}

func (a *app) tokenCreateCmd() *cobra.Command {
	var req relayapi.AddTokenRequest
	c := &cobra.Command{
		Use:     "create NAME",
		Short:   "Make a token, which is shown once",
		Example: "  doppel relay token create ci --expires 720h",
		Args:    cobra.ExactArgs(1),
	}
	c.Flags().DurationVar(&req.For, "expires", 30*24*time.Hour, "how long it counts, at most a year")
	return a.tokenCommand(c, func(c *cobra.Command, client *relayclient.Client, login relayclient.Login, args []string) error {
		req.Name = args[0]
		var out relayapi.Token
		if err := client.Call(c.Context(), relayapi.PathAddToken, req, &out); err != nil {
			return err
		}
		return a.print(out, func(w io.Writer) {
			fmt.Fprintf(w, "Token %s at %s, until %s. It is shown once:\n", out.Name, login.URL, out.Expires.Local().Format("2006-01-02 15:04"))
			fmt.Fprintf(w, "  %s=%s %s=%s\n", relayclient.EnvRelay, login.URL, relayclient.EnvToken, out.Token)
		})
	})
}

func (a *app) tokenListCmd() *cobra.Command {
	c := &cobra.Command{Use: "list", Short: "List your tokens, and when they were used last", Args: cobra.NoArgs}
	return a.tokenCommand(c, func(c *cobra.Command, client *relayclient.Client, login relayclient.Login, _ []string) error {
		var out relayapi.TokenList
		if err := client.Call(c.Context(), relayapi.PathListTokens, struct{}{}, &out); err != nil {
			return err
		}
		return a.print(out, func(w io.Writer) {
			if len(out.Tokens) == 0 {
				fmt.Fprintf(w, "No tokens at %s\n", login.URL)
			}
			for _, t := range out.Tokens {
				used := "never used"
				if t.Used != nil {
					used = "last used " + t.Used.Local().Format("2006-01-02 15:04")
				}
				fmt.Fprintf(w, "%s: until %s, %s\n", t.Name, t.Expires.Local().Format("2006-01-02 15:04"), used)
			}
		})
	})
}

func (a *app) tokenDeleteCmd() *cobra.Command {
	c := &cobra.Command{Use: "delete NAME", Short: "End a token at once", Args: cobra.ExactArgs(1)}
	return a.tokenCommand(c, func(c *cobra.Command, client *relayclient.Client, _ relayclient.Login, args []string) error {
		if err := client.Call(c.Context(), relayapi.PathDeleteToken, relayapi.DeleteTokenRequest{Name: args[0]}, nil); err != nil {
			if uerr.From(err).Kind == uerr.NotFound {
				return uerr.New(uerr.NotFound, "see them with: doppel relay token list", "you have no token %q", args[0])
			}
			return err
		}
		return a.print(localapi.Empty{}, func(w io.Writer) { fmt.Fprintf(w, "Deleted the token %s\n", args[0]) })
	})
}
