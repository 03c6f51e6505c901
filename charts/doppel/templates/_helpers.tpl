{{- define "doppel.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: doppel
app.kubernetes.io/version: {{ .Chart.AppVersion | replace "+" "_" | trunc 63 | quote }}
{{ include "doppel.selector" . }}
{{- end }}

{{- define "doppel.selector" -}}
app.kubernetes.io/name: traffic-manager
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* Which pods the Services lead to. Every pod is made with the label, and one that stands by takes it off itself (internal/manager/active.go). */ -}}
{{- define "doppel.active" -}}
{{ include "doppel.selector" . }}
app.kubernetes.io/part-of: doppel
{{- end }}

{{- /* The image tag: build metadata ("+abc") is legal in a version and not in a tag. */ -}}
{{- define "doppel.tag" -}}
{{ default (.Chart.AppVersion | replace "+" "_") .Values.image.tag }}
{{- end }}

{{- define "doppel.agentImage" -}}
{{ default (printf "%s/traffic-agent:%s" .Values.image.registry (include "doppel.tag" .)) .Values.agent.image }}
{{- end }}

{{- /* The name under which the API server knows the manager. */ -}}
{{- define "doppel.managerUser" -}}
system:serviceaccount:{{ .Release.Namespace }}:traffic-manager
{{- end }}

{{- /* clientRbac.subjects with the API group that users and groups need. */ -}}
{{- define "doppel.subjects" -}}
{{- range .Values.clientRbac.subjects }}
- kind: {{ .kind }}
  name: {{ .name | quote }}
  {{- if eq .kind "ServiceAccount" }}
  namespace: {{ .namespace | quote }}
  {{- else }}
  apiGroup: {{ .apiGroup | default "rbac.authorization.k8s.io" }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* What the names of cluster-wide objects end in: two managers that share a cluster, each with namespaces of its own, have them apart. */ -}}
{{- define "doppel.suffix" -}}
{{ if .Values.namespaces }}-{{ .Release.Namespace }}{{ end }}
{{- end }}

{{- /* Mistakes that the schema cannot see. */ -}}
{{- define "doppel.check" -}}
{{- if has .Release.Namespace .Values.namespaces }}
{{- fail (printf "namespaces: %s is the traffic-manager's own namespace, whose pods are never intercepted" .Release.Namespace) }}
{{- end }}
{{- range list "app.kubernetes.io/part-of" "doppel.dev/replica" }}
{{- if hasKey $.Values.manager.podLabels . }}
{{- fail (printf "manager.podLabels: %s says which of the traffic-manager's pods the Services lead to" .) }}
{{- end }}
{{- end }}
{{- if and (not .Values.admission.policy) (not .Values.namespaces) }}
{{- fail "admission.policy: without the policy everybody who may connect can act in everybody's name, which is for single namespaces only; list them in namespaces" }}
{{- end }}
{{- if and (eq .Values.direct.service "ClusterIP") (not .Values.direct.addresses) }}
{{- fail "direct.addresses: where laptops reach the ingress before Service traffic-manager-direct, as HOST:PORT" }}
{{- end }}
{{- if and (eq .Values.direct.service "NodePort") .Values.namespaces (not .Values.direct.addresses) }}
{{- fail "direct.addresses: a traffic-manager for some namespaces may not look at nodes; say as HOST:PORT where laptops reach their port" }}
{{- end }}
{{- if and .Values.namespaces .Values.clientRbac.aggregate }}
{{- fail "clientRbac.aggregate: Kubernetes aggregates ClusterRoles, of which an install with namespaces makes none; use clientRbac.create" }}
{{- end }}
{{- end }}
