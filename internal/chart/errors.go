package chart

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	authn "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// Sentinels that callers branch on; what is returned wraps them in a *uerr.Error.
var (
	// ErrInstalled says that the cluster has a release already.
	ErrInstalled = errors.New("the traffic-manager is already installed")
	// ErrNotInstalled says that the namespace has no release.
	ErrNotInstalled = errors.New("the traffic-manager is not installed")
)

// explain turns an error of the cluster or of Helm into one that a user can act on. op is what was tried ("install the traffic-manager").
func (c *client) explain(ctx context.Context, err error, op string) error {
	if err == nil {
		return nil
	}
	var known *uerr.Error
	switch {
	case errors.As(err, &known):
		return err
	case errors.Is(context.Cause(ctx), context.Canceled):
		return uerr.Wrap(context.Cause(ctx), uerr.Canceled, "", "%s", op)
	case ctx.Err() != nil:
		return uerr.New(uerr.Cluster, "try again with a longer --timeout", "%s: not done in time: %s", op, oneLine(err.Error()))
	}
	msg := oneLine(first(err).Error())
	if m := elsewhereRE.FindStringSubmatch(msg); m != nil {
		return uerr.New(uerr.Conflict, "a cluster has one; use it with --manager-namespace "+m[1]+", or uninstall it first",
			"%s: it is already installed in namespace %s", op, m[1])
	}
	switch {
	case strings.Contains(msg, "attempting to grant RBAC permissions not currently held"):
		return uerr.New(uerr.Denied, c.adminHint(op), "%s: Kubernetes lets you create no roles with rights that you do not have yourself, and the traffic-manager's are such", op)
	case strings.Contains(msg, "exceeded quota"):
		return uerr.New(uerr.Cluster, "raise the quota of namespace "+c.namespace+", or choose another with --manager-namespace", "%s: %s", op, msg)
	case strings.Contains(msg, "denied the request") || strings.Contains(msg, "denied request"):
		return uerr.New(uerr.Denied, "an admission policy of this cluster refuses it; its administrator can exempt namespace "+c.namespace, "%s: %s", op, msg)
	case apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) || strings.Contains(msg, "is forbidden: "):
		return uerr.New(uerr.Denied, c.adminHint(op), "%s: %s", op, msg)
	case strings.Contains(msg, "cannot be imported into the current release"):
		return uerr.New(uerr.Conflict, "the object belongs to somebody else; remove or rename it", "%s: %s", op, msg)
	case strings.Contains(msg, "chart requires kubeVersion"):
		return uerr.New(uerr.Cluster, "doppel needs Kubernetes 1.30 or later", "%s: %s", op, msg)
	case strings.Contains(msg, "another operation (install/upgrade/rollback) is in progress"):
		return uerr.New(uerr.Conflict, "somebody else is at it; try again in a minute", "%s: %s", op, msg)
	}
	return uerr.New(uerr.Cluster, "", "%s: %s", op, msg)
}

// first is the first of errors that were joined: Helm applies many objects at once and reports on each.
func first(err error) error {
	many, ok := err.(interface{ Unwrap() []error }) // not errors.As: what wraps one error of a list has the better words
	if ok && len(many.Unwrap()) > 0 {
		return first(many.Unwrap()[0])
	}
	return err
}

// elsewhereRE finds the namespace in Helm's words for an object of the same release in another namespace.
var elsewhereRE = regexp.MustCompile(`exists and cannot be imported into the current release: .*"meta\.helm\.sh/release-namespace" must equal "[^"]*": current value is "([^"]+)"`)

// adminHint is the one command, for somebody who may run it, that does op; an install also gives the caller the rights to use doppel.
func (c *client) adminHint(op string) string {
	var b strings.Builder
	if op == opStatus {
		return "you may not read Helm's releases in namespace " + c.namespace
	}
	verb, _, _ := strings.Cut(op, " ")
	b.WriteString("ask an administrator of the cluster to run: doppel helm " + verb + kube.ManagerFlag(c.namespace))
	for _, f := range c.flags {
		b.WriteString(" " + f)
	}
	if op != opInstall {
		return b.String()
	}
	ctx, cancel := context.WithTimeout(context.Background(), requestTimeout)
	defer cancel()
	r, err := c.unbound.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authn.SelfSubjectReview{}, metav1.CreateOptions{})
	if err == nil {
		b.WriteString(" --set 'clientRbac.create=true' --set-string " + uerr.ShellQuote(subjectValues(r.Status.UserInfo.Username)))
	}
	return b.String()
}

// subjectValues are the values that say whom clientRbac.create gives the rights to use doppel, in --set-string's syntax: a name may look like a number.
func subjectValues(user string) string {
	kind, name, ns := "User", user, ""
	if rest, ok := strings.CutPrefix(user, "system:serviceaccount:"); ok {
		if n, a, ok := strings.Cut(rest, ":"); ok {
			kind, ns, name = "ServiceAccount", n, a
		}
	}
	esc := strings.NewReplacer(`\`, `\\`, `,`, `\,`)
	v := fmt.Sprintf("clientRbac.subjects[0].kind=%s,clientRbac.subjects[0].name=%s", kind, esc.Replace(name))
	if ns != "" {
		v += ",clientRbac.subjects[0].namespace=" + ns
	}
	return v
}

// oneLine joins the lines of s and drops what gRPC and Helm put in front of the reason.
func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	for {
		i := strings.Index(s, "rpc error: code = ")
		if i < 0 {
			return s
		}
		j := strings.Index(s[i:], " desc = ")
		if j < 0 {
			return s
		}
		s = s[:i] + s[i+j+len(" desc = "):]
	}
}
