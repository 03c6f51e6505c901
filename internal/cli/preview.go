package cli

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/match"
	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/relayclient"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// previewPatience bounds how long an intercept waits for a preview that nobody has asked for.
const previewPatience = 3 * time.Second

// previewFlags ask for a preview of an intercept.
type previewFlags struct {
	want    bool
	said    *pflag.Flag // changed: want was said, and else it is as it comes
	ingress localapi.Ingress
	port    uint16
	carry   string
}

func (p *previewFlags) register(f *pflag.FlagSet) {
	f.BoolVar(&p.want, "preview-url", false, "make a link through which others see it, at the relay that you are logged in at, and take its requests; false: make none, though you are logged in")
	p.said = f.Lookup("preview-url")
	p.ingressFlags(f)
}

func (p *previewFlags) ingressFlags(f *pflag.FlagSet) {
	f.StringVar(&p.ingress.Host, "ingress-host", "", "where the preview's requests enter the cluster: a service as NAME.NAMESPACE (default: as last time, or asked for)")
	f.Uint16Var(&p.port, "ingress-port", 0, "its port")
	f.BoolVar(&p.ingress.TLS, "ingress-tls", false, "it speaks TLS")
	f.StringVar(&p.carry, "preview-propagate", "none", "header by which apps with tracing pass on whose request it is: none, baggage or tracestate")
	f.StringVar(&p.ingress.L5Host, "ingress-l5", "", "the host that it is asked for (default: --ingress-host)")
}

// check checks what can be checked before anything is made.
func (p *previewFlags) check() error {
	if (p.ingress.Host == "") != (p.port == 0) {
		return uerr.New(uerr.Usage, "for example: --ingress-host web.shop --ingress-port 80", "--ingress-host and --ingress-port go together")
	}
	switch p.carry {
	case "none", match.Baggage, match.TraceState:
		return nil
	}
	return uerr.New(uerr.Usage, "use none, baggage or tracestate", "--preview-propagate %s", p.carry)
}

// made is a preview that was made for an intercept, or a hint how to get one.
type made struct {
	relayapi.Preview
	client   *relayclient.Client
	byItself bool // nobody has asked for it
	hint     string
}

// make makes the domain of a preview at the relay of the connected cluster; the intercept is to name it.
func (p *previewFlags) make(ctx context.Context, a *app, use, name, namespace, workload string) (*localapi.Preview, *made, error) {
	var r localapi.RelayResult
	if err := a.call(ctx, localapi.MethodRelay, localapi.RelayRequest{Choice: localapi.Choice{Use: use}}, &r); err != nil {
		return nil, nil, err
	}
	switch {
	case r.URL == "":
		return nil, nil, uerr.New(uerr.NotFound, "an administrator joins it to a relay: chart value relay.url", "the cluster has no relay, and so no previews")
	case r.Problem != "" || r.Cluster == "":
		return nil, nil, uerr.New(uerr.Cluster, "tell the cluster's administrator", "the cluster is not joined to its relay %s: %s", r.URL, r.Problem)
	}
	logins, login, client, err := a.atRelay(ctx, r.URL)
	if err != nil {
		return nil, nil, err
	}
	if namespace == "" {
		namespace = r.Namespace
	}
	in, err := p.where(ctx, a, use, namespace, login.Ingresses[r.Cluster])
	if err != nil {
		return nil, nil, err
	}
	m, err := p.create(ctx, client, in, relayapi.CreatePreviewRequest{Cluster: r.Cluster, Name: name, Namespace: namespace, Workload: workload})
	if err != nil {
		return nil, nil, err
	}
	return &localapi.Preview{ID: m.ID, Ingress: in}, m, logins.Enter(login, r.Cluster, relayclient.Ingress(in))
}

// create asks the relay for the domain of a preview whose requests enter the cluster there.
func (p *previewFlags) create(ctx context.Context, client *relayclient.Client, in localapi.Ingress, req relayapi.CreatePreviewRequest) (*made, error) {
	req.Authority = authority(in)
	if p.carry != "none" {
		req.Propagate = p.carry
	}
	m := &made{client: client}
	return m, client.Call(ctx, relayapi.PathCreatePreview, req, &m.Preview)
}

// authority is the Host header of a preview's requests.
func authority(in localapi.Ingress) string {
	if in.L5Host != "" {
		return in.L5Host
	}
	if in.TLS && in.Port == 443 || !in.TLS && in.Port == 80 {
		return in.Host
	}
	return fmt.Sprintf("%s:%d", in.Host, in.Port)
}

// undo forgets a preview that was made for an intercept which did not come about.
func (m *made) undo(ctx context.Context) {
	if m != nil && m.New {
		_ = m.client.Call(context.WithoutCancel(ctx), relayapi.PathDeletePreview, relayapi.PreviewRequest{Preview: m.Host}, nil) // it leads nowhere
	}
}

// known is the ingress of the flags, or of last time; without a host: neither says.
func (p *previewFlags) known(last relayclient.Ingress) localapi.Ingress {
	if p.ingress.Host == "" {
		return localapi.Ingress(last)
	}
	in := p.ingress
	in.Port = int32(p.port)
	return in
}

// where is the ingress: of the flags, of last time, or as the user says.
func (p *previewFlags) where(ctx context.Context, a *app, use, namespace string, last relayclient.Ingress) (localapi.Ingress, error) {
	in := p.known(last)
	if in.Host != "" {
		return in, nil
	}
	var r localapi.RelayResult
	if err := a.call(ctx, localapi.MethodRelay, localapi.RelayRequest{Choice: localapi.Choice{Use: use}, Guess: true, Namespace: namespace}, &r); err != nil {
		return in, err
	}
	var guess localapi.Ingress
	if len(r.Ingresses) > 0 {
		guess = r.Ingresses[0]
	}
	if !a.Terminal {
		hint := "for example: --ingress-host web.shop --ingress-port 80"
		if guess.Host != "" {
			hint = fmt.Sprintf("perhaps: --ingress-host %s --ingress-port %d", guess.Host, guess.Port)
			if guess.TLS {
				hint += " --ingress-tls"
			}
			if guess.L5Host != "" {
				hint += " --ingress-l5 " + guess.L5Host
			}
		}
		return in, uerr.New(uerr.Usage, hint, "where do requests enter the cluster?")
	}
	return a.askIngress(guess)
}

// askIngress asks the user, who takes a guess by pressing enter.
func (a *app) askIngress(guess localapi.Ingress) (in localapi.Ingress, err error) {
	r := bufio.NewReader(a.In)
	ask := func(what, otherwise string) string {
		if err != nil {
			return ""
		}
		fmt.Fprintf(a.Err, "%s", what)
		if otherwise != "" {
			fmt.Fprintf(a.Err, " [%s]", otherwise)
		}
		fmt.Fprint(a.Err, ": ")
		var line string
		if line, err = r.ReadString('\n'); err == io.EOF && line != "" {
			err = nil
		}
		if line = strings.TrimSpace(line); line == "" {
			return otherwise
		}
		return line
	}
	fmt.Fprintln(a.Err, "To make a preview, doppel has to know where requests enter the cluster. You are asked once.")
	in.Host = ask("1/4: service, as NAME.NAMESPACE", guess.Host)
	port := ask("2/4: its port", map[bool]string{true: strconv.Itoa(int(guess.Port))}[guess.Port != 0])
	tls := ask("3/4: does it speak TLS (y/n)", map[bool]string{true: "y", false: "n"}[guess.TLS])
	in.L5Host = ask("4/4: the host that it is asked for", cmpHost(guess.L5Host, in.Host))
	if err != nil {
		return in, uerr.Wrap(err, uerr.Usage, "use --ingress-host and --ingress-port", "the questions were not answered")
	}
	n, perr := strconv.ParseUint(port, 10, 16)
	if perr != nil || n == 0 || in.Host == "" {
		return in, uerr.New(uerr.Usage, "for example: web.shop and 80", "%q port %q is no service", in.Host, port)
	}
	in.Port, in.TLS = int32(n), strings.HasPrefix(strings.ToLower(tls), "y")
	if in.L5Host == in.Host {
		in.L5Host = ""
	}
	return in, nil
}

func cmpHost(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func (a *app) previewCmd() *cobra.Command {
	c := &cobra.Command{Use: "preview", Short: "Links through which others see your intercepts"}
	c.AddCommand(a.previewCreateCmd(), a.previewListCmd(), a.previewPublishCmd(), a.previewUnpublishCmd(), a.previewShareCmd(), a.previewDeleteCmd())
	return c
}

func (a *app) previewCreateCmd() *cobra.Command {
	var p previewFlags
	var use string
	c := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a link for an intercept that is there",
		Long: `Create makes a link for an intercept that is there. What it took, it takes as well. The intercept is made anew for that, so that for a moment
the app in the cluster answers.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, name := c.Context(), args[0]
			if err := p.check(); err != nil {
				return err
			}
			in, use, err := a.mine(ctx, name, use)
			if err != nil {
				return err
			}
			preview, m, err := p.make(ctx, a, use, name, in.Namespace, in.Workload)
			if err != nil {
				return err
			}
			var made localapi.Intercept
			if err := a.call(ctx, localapi.MethodPreview, localapi.PreviewRequest{Choice: localapi.Choice{Use: use}, Name: name, Preview: *preview}, &made); err != nil {
				m.undo(ctx)
				return err
			}
			return a.showPreview(m.Preview)
		},
	}
	p.ingressFlags(c.Flags())
	useFlag(c.Flags(), &use, "the only one")
	return c
}

// mine finds an intercept of this machine, for which it needs no right in the cluster, and says which connection has it; if several have one of
// that name, it is what use said.
func (a *app) mine(ctx context.Context, name, use string) (localapi.Intercept, string, error) {
	var st localapi.Status
	if err := a.call(ctx, localapi.MethodStatus, localapi.StatusRequest{Choice: localapi.Choice{Use: use}}, &st); err != nil {
		return localapi.Intercept{}, "", err
	}
	if st.Session == nil {
		return localapi.Intercept{}, "", uerr.New(uerr.NotConnected, "connect first with: doppel connect", "not connected")
	}
	var found []localapi.Intercept
	connection := use
	for _, s := range sessions(st) {
		for _, in := range s.Intercepts {
			if in.Name == name {
				found, connection = append(found, in), s.Connection
			}
		}
	}
	switch len(found) {
	case 0:
		return localapi.Intercept{}, "", uerr.New(uerr.NotFound, "see your intercepts with: doppel status", "no intercept %q of yours", name)
	case 1:
		return found[0], connection, nil
	}
	return found[0], use, nil
}

func (a *app) showPreview(p relayapi.Preview) error {
	return a.print(p, func(w io.Writer) { writePreview(w, p) })
}

func writePreview(w io.Writer, p relayapi.Preview) {
	fmt.Fprintf(w, "   Preview URL    : %s\n", p.URL)
	fmt.Fprintf(w, "   Seen by        : %s\n", audience(p))
}

// audience says who may see a preview.
func audience(p relayapi.Preview) string {
	s := "the members of your team"
	if p.Public {
		s = "everybody who has the link"
		if p.Password {
			s += " and the password"
		}
		if p.Expires != nil {
			s += ", until " + p.Expires.Local().Format("2006-01-02 15:04")
		}
	}
	for _, e := range p.Shared {
		s += ", " + e
	}
	return s
}

func (a *app) previewListCmd() *cobra.Command {
	var relay string
	c := &cobra.Command{
		Use:   "list",
		Short: "List the previews of your teams",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			_, login, client, err := a.atRelay(c.Context(), relay)
			if err != nil {
				return err
			}
			var out relayapi.PreviewList
			if err := client.Call(c.Context(), relayapi.PathListPreviews, struct{}{}, &out); err != nil {
				return err
			}
			return a.print(out, func(w io.Writer) {
				if len(out.Previews) == 0 {
					fmt.Fprintf(w, "No previews at %s\n", login.URL)
				}
				for _, p := range out.Previews {
					fmt.Fprintf(w, "%s: %s, intercept %s of %s in %s of %s, by %s\n", p.Host, p.State, p.Name, p.Workload, p.Namespace, p.Cluster, p.Owner)
					writePreview(w, p)
				}
			})
		},
	}
	relayFlag(c, &relay)
	return c
}

func relayFlag(c *cobra.Command, relay *string) {
	c.Flags().StringVar(relay, "relay", "", "`URL` of the relay (default: that of the connected cluster, or the last one)")
}

// previewChange is a command that changes one preview.
func (a *app) previewChange(c *cobra.Command, call func(ctx context.Context, client *relayclient.Client, args []string) (*relayapi.Preview, error)) *cobra.Command {
	var relay string
	c.RunE = func(c *cobra.Command, args []string) error {
		_, _, client, err := a.atRelay(c.Context(), relay)
		if err != nil {
			return err
		}
		p, err := call(c.Context(), client, args)
		if err != nil {
			return err
		}
		if p == nil {
			return a.print(localapi.Empty{}, func(w io.Writer) { fmt.Fprintf(w, "Deleted the preview %s\n", args[0]) })
		}
		return a.showPreview(*p)
	}
	relayFlag(c, &relay)
	return c
}

func (a *app) previewPublishCmd() *cobra.Command {
	var req relayapi.PublishRequest
	var passwordFile string
	c := &cobra.Command{
		Use:   "publish PREVIEW",
		Short: "Let everybody who has the link see a preview",
		Long: `Publish lets everybody who has the link see a preview: for a time, or until it is unpublished; with a password, if you set one. A password that
it has stays until another one is set, it is taken away by --no-password, or the preview is unpublished. PREVIEW is the name of your intercept, or the link.`,
		Example: `  doppel preview publish web --for 2h
  doppel preview publish web --password-file -`,
		Args: cobra.ExactArgs(1),
	}
	c.Flags().DurationVar(&req.For, "for", 0, "for how long (default: until it is unpublished)")
	c.Flags().StringVar(&passwordFile, "password-file", "", "ask visitors for the password that is the first line of this `FILE` (-: of the standard input)")
	c.Flags().BoolVar(&req.NoPassword, "no-password", false, "ask visitors for no password any more")
	return a.previewChange(c, func(ctx context.Context, client *relayclient.Client, args []string) (*relayapi.Preview, error) {
		if passwordFile != "" && req.NoPassword {
			return nil, uerr.New(uerr.Usage, "use one of them", "--password-file and --no-password contradict each other")
		}
		var err error
		if req.Password, err = a.firstLine(passwordFile); err != nil {
			return nil, err
		}
		req.Preview, req.Public = args[0], true
		p := new(relayapi.Preview)
		return p, client.Call(ctx, relayapi.PathPublishPreview, req, p)
	})
}

// firstLine reads a password.
func (a *app) firstLine(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	r := a.In
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return "", uerr.Wrap(err, uerr.Usage, "", "read the password")
		}
		defer f.Close()
		r = f
	}
	s := bufio.NewScanner(r)
	if !s.Scan() || s.Text() == "" {
		return "", uerr.New(uerr.Usage, "write it on the first line", "there is no password in %s", file)
	}
	return s.Text(), nil
}

func (a *app) previewUnpublishCmd() *cobra.Command {
	c := &cobra.Command{Use: "unpublish PREVIEW", Short: "Let only the team, and those it is shared with, see a preview; visitors are put out at once", Args: cobra.ExactArgs(1)}
	return a.previewChange(c, func(ctx context.Context, client *relayclient.Client, args []string) (*relayapi.Preview, error) {
		p := new(relayapi.Preview)
		return p, client.Call(ctx, relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: args[0]}, p)
	})
}

func (a *app) previewShareCmd() *cobra.Command {
	var remove bool
	c := &cobra.Command{
		Use:   "share PREVIEW EMAIL",
		Short: "Let one more person see a preview, who has an account at the relay",
		Args:  cobra.ExactArgs(2),
	}
	c.Flags().BoolVar(&remove, "remove", false, "take that back")
	return a.previewChange(c, func(ctx context.Context, client *relayclient.Client, args []string) (*relayapi.Preview, error) {
		p := new(relayapi.Preview)
		return p, client.Call(ctx, relayapi.PathSharePreview, relayapi.ShareRequest{Preview: args[0], Email: args[1], Remove: remove}, p)
	})
}

func (a *app) previewDeleteCmd() *cobra.Command {
	c := &cobra.Command{Use: "delete PREVIEW", Short: "Remove a preview's link for good", Args: cobra.ExactArgs(1)}
	return a.previewChange(c, func(ctx context.Context, client *relayclient.Client, args []string) (*relayapi.Preview, error) {
		return nil, client.Call(ctx, relayapi.PathDeletePreview, relayapi.PreviewRequest{Preview: args[0]}, nil)
	})
}
