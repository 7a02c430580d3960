{{- define "forebay.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "forebay.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "forebay.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "forebay.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- define "forebay.operator" -}}
{{ include "forebay.fullname" . }}-operator
{{- end }}

{{- /* Cluster-scoped names are those of a namespace's release. */}}
{{- define "forebay.clusterOperator" -}}
{{ include "forebay.fullname" . }}-{{ .Release.Namespace }}-operator
{{- end }}

{{- /* Whose pools these are: the label of EPP Services, at most 63 characters. */}}
{{- define "forebay.controller" -}}
{{- $name := printf "%s.%s" .Release.Namespace (include "forebay.fullname" .) -}}
{{- if .Values.operator.controllerName -}}
{{- .Values.operator.controllerName -}}
{{- else if gt (len $name) 63 -}}
{{- printf "%s-%s" (trunc 52 $name | trimSuffix "-" | trimSuffix ".") (sha256sum $name | trunc 10) -}}
{{- else -}}
{{- $name -}}
{{- end -}}
{{- end }}

{{- /* The name that endpoint pickers dial and expect in the operator's certificate. */}}
{{- define "forebay.controlServer" -}}
{{ include "forebay.operator" . }}.{{ .Release.Namespace }}.svc
{{- end }}

{{- define "forebay.controlSecret" -}}
{{- .Values.controlTls.secretName | default (printf "%s-control-tls" (include "forebay.fullname" .)) -}}
{{- end }}

{{- define "forebay.controlCa" -}}
{{- .Values.controlTls.caConfigMap | default (printf "%s-control-ca" (include "forebay.fullname" .)) -}}
{{- end }}

{{- /* Namespaces of pools, each once, as JSON: {"items": [...]} */}}
{{- define "forebay.poolNamespaces" -}}
{{- $found := list -}}
{{- range .Values.pools -}}
{{- $found = append $found (default $.Release.Namespace .namespace) -}}
{{- end -}}
{{- dict "items" (uniq $found | sortAlpha) | toJson -}}
{{- end }}

{{- /* Labels that say which pods an object is about: (dict "root" $ "component" NAME ["pool" NAME]).
The pool's is not forebay.dev/inference-pool: a Service's labels come to be on its EndpointSlices, and
that one there means model servers. */}}
{{- define "forebay.selector" -}}
app.kubernetes.io/name: {{ include "forebay.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .pool }}
forebay.dev/pool: {{ . }}
{{- end }}
{{- end }}

{{- /* All labels of an object, with the same argument. */}}
{{- define "forebay.labels" -}}
{{ include "forebay.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}
